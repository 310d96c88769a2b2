"""All mutants there are."""

from tests.mutants import copying, graph, images, serving
from tests.mutants.mutant import Mutant

MUTANTS: list[Mutant] = [*copying.MUTANTS, *graph.MUTANTS, *images.MUTANTS, *serving.MUTANTS]
