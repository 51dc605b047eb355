"""The code that travels with a checkpoint: flat files that import each other and public libraries only."""
