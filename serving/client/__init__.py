"""The Python client over HTTP; needs no GPU library.

`client` is `MemoRAG` and its memories, `errors` what it raises, `progress` what it shows of a job.
"""
