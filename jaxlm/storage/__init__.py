"""Files: on this machine, in archives, and at addresses.

disk      names from outside, atomic writing, locks, and hashes of content
archives  which entries of zip and tar files may be read
buckets   data, weights and run folders at addresses such as gs://bucket/name
"""
