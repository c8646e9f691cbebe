"""The simulation: the production scheduler, admission, supervisor, ledger and drain on a virtual clock, under drawn scripts.

`script` is what happens, as data; `draw` makes one from a seed; `world` plays it; `checks` are the laws that must hold all the
way; `shrink` makes a script that breaks one small; `runs` plays many. Same script, same run, event for event.
"""

from jilju.simulation.draw import draw
from jilju.simulation.runs import Outcome, play, play_many
from jilju.simulation.script import Script
from jilju.simulation.shrink import shrink
from jilju.simulation.world import Backend, World

__all__ = ["Backend", "Outcome", "Script", "World", "draw", "play", "play_many", "shrink"]
