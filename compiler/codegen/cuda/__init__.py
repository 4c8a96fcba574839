"""From launches to model.so: device code, the tables that the host walks, and the runtime in C that walks them."""
