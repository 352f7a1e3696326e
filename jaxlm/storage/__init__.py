"""Local files, archives and buckets.

disk      untrusted names, atomic writes, locks and content hashes
archives  entries of zip and tar files, and the links between them
buckets   data, weights and run folders at addresses such as gs://bucket/name
"""
