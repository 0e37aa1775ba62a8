"""Training loops of other projects, with semantic-level alignment added. Each file is a program that runs.

A program adds at most six lines, eight with a hook. Lines that end in `# +` are added. A line that ends in `# check`
logs the figures for the tests.
"""
