"""The head inside of models and trainers of others, a file each, imported only when asked for: docs/integrations.md.

Hosts are read by the names of their attributes; none is imported here, and the kernels need none of them.
"""
