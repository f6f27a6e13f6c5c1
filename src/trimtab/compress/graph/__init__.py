"""The channel graph: which channels of any model may be cut, and how to cut them.

>>> import torch
>>> from torch import nn
>>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))
>>> graph = ChannelGraph(net, torch.zeros(1, 3, 8, 8))
>>> [(g.size, g.producers, g.consumers) for g in graph.groups]
[(8, (('0.weight', 0), ('0.bias', 0), ('1.weight', 0), ('1.bias', 0)), (('3.weight', 1),))]
>>> from trimtab.core.edit import apply
>>> apply(net, graph.edits({0: [0, 1, 2]}))[3]
Conv2d(3, 4, kernel_size=(1, 1), stride=(1, 1))
"""

from trimtab.compress.graph.channels import ChannelGraph, Group
from trimtab.compress.graph.patch import Refused

__all__ = ["ChannelGraph", "Group", "Refused"]
