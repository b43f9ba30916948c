"""Files: atomic writes, finished work, record formats, progress."""
