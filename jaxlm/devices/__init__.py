"""Processes, hosts and chips: what a run is computed on.

hosts     many hosts in one run
sharding  the mesh, and the table from logical axes to mesh axes
chips     the rates of chips, and the topologies of TPUs
programs  the compiled functions of one model
process   standard streams, and signals that end a command
"""
