"""Other people's loops, each with semantic-level alignment added in at most ten lines, and each a program that runs.

Lines that end in `# +` are added; `# check` marks what shows that they work.
"""
