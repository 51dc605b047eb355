"""The command line: thin, every command a dataclass of arguments and one call."""
