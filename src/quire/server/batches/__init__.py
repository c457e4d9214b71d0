"""Files and batches: thousands of requests in one file, answered in the background and kept on disk.

`store` keeps files, batches and answers in SQLite. `lines` reads and checks an input file. `service` answers the lines
of all batches through the endpoints that interactive clients use. `endpoints` holds the routes /v1/files and
/v1/batches.
"""
