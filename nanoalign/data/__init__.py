"""Data sources -> the rows of a run: files, formats of records, chat templates, what is held out."""
