"""Experiments with S-IB training on data that ships with the package (extra `[lab]`); `import sib_fast` skips it."""
