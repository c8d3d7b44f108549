"""Low memory and speed: each file is one technique, with a naive twin in the tests."""
