"""Training, data sets, explanations as pictures, and studies (extra `[lab]`); `import sib_fast` skips it."""
