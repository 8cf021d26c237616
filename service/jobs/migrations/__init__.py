"""Changes of the job store's tables, in order, for Alembic: `versions/` has one file per change.

A change that has been released is never edited; the next one follows it by `down_revision`. There is no way back: an
older version does not start on newer tables. `service.jobs.engines` runs what is missing when a store opens.
"""
