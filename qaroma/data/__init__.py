"""Data: from files to examples. Read (sources), recognise (forms), render (templates), tokenise (encode)."""
