"""Settings that come with the workbench, one file for each pair of domains."""
