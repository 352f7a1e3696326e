"""Processes, hosts and chips of a run.

hosts     runs of several hosts
sharding  the mesh, and the table from logical axes to mesh axes
chips     rates and memory of chips, and topologies of TPUs
programs  the compiled functions of one model
process   standard streams and signals
"""
