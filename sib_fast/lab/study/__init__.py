"""``sib-fast study``: plain against S-IB training over seeds and variants, and what came out, whatever it is."""
