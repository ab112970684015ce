"""The networks of the built-in tasks, apart from these, so that a recipe is checked without torch."""
