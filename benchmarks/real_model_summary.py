def add(path): pass
