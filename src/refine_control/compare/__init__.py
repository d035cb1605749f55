"""Rows of a table, trained and scored over several seeds: the method, its rivals, its parts left out."""
