"""Documentation site: its pages, its configuration (`conf.py`) and the code of its pictures (`drawings`)."""
