"""Using what a run left: answers and scores."""
