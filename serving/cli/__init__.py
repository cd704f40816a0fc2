"""The command line `memorag`: a thin skin over the client, the daemon and the batch.

`main` joins the commands; each other file is a command or a family of them, `show` how all of them speak.
"""
