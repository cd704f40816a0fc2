"""Files on their way in and out: uploads, their conversion to text, archives.

`receive` reads requests that bring documents, `convert` makes text of files, `uploads` makes texts durable.
"""
