"""Studies: files of rows, each run with several seeds, and the code that runs and tabulates them."""
