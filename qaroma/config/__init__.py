"""Settings: the schema, what methods there are, how they are read and resolved."""
