"""Other people's loops, each with semantic-level alignment added in at most six lines, and each a program that runs.

Lines that end in `# +` are added; `# check` marks the line that logs what they do.
"""
