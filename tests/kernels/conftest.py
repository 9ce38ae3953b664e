"""Here for its place: pytest puts a conftest's folder on the path, so that the folders below import `compiling`."""
