"""The values of ``impl``: a file each, and the choice among them."""
