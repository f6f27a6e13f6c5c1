"""Parts of networks that run on two machines: a narrow place to cut at, its code, and HTTP between the two.

`bottleneck` holds the layers, `codec` turns whole numbers into bytes by tables that both sides hold, `parts` are the
files, `tail` is the server, `device` the other side, and `link` its way to the server. A device needs the extra
``trimtab[edge]``, a server ``trimtab[serve]``, too.
"""
