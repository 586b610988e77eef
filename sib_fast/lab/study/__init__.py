"""``sib-fast study``: networks trained in several ways over seeds, explained, scored and compared, whatever the outcome."""
