"""Studies: files of rows, each of which runs with several seeds, and the code that runs them and writes the tables."""
