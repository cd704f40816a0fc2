"""Which memories there are: names, versions, jobs, quotas and what may be deleted.

`catalog` decides, `actor` is its one process, `job_queue` lets tenants take turns, `retention` deletes, `restore`
reads all of it from storage after a restart.
"""
