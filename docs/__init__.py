"""The site: pages, how they are built (`conf.py`), and the code of their pictures (`drawings`)."""
