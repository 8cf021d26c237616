"""One file per change of the tables, each with `revision` and `down_revision`."""
