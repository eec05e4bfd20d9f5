"""A bundle on its way: signed, packed, published, tried on another machine, built again."""
