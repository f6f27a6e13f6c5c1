"""Parts of networks that run on two machines: a narrow place to cut at, its code, frames on the wire, and the peers.

`bottleneck` holds the layers, `codec` turns whole numbers into bytes by tables that both sides hold, `frame` is the
wire format, `peers` the two ends of a connection, `parts` the files and the server, `device` the other side. Coding
needs the extra ``trimtab[edge]``.
"""
