"""Durable files: every write of the project goes to disk, S3 or GCS through here, forced and renamed.

`durable` is what the rooms call; `files` is each single effect on a file system, so that tests can make any one fail.
"""
