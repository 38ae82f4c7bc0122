"""A contract for import-linter (`make lint`): which imports a room may have, everything else being refused.

[[tool.importlinter.contracts]]
type = "imports_only"
modules = ["torl_mega.sandbox.jail"]     the room
allowed = ["torl_mega.sandbox.jail"]     what it may import of this project
libraries = []                           third-party packages, "*" for any; the standard library is always allowed
"""

from __future__ import annotations

import sys
from typing import Any

from importlinter import Contract, ContractCheck, fields, output


class ImportsOnly(Contract):
    type_name = "imports_only"

    modules = fields.ListField(subfield=fields.StringField())
    allowed = fields.ListField(subfield=fields.StringField())
    libraries = fields.ListField(subfield=fields.StringField())

    def check(self, graph: Any, verbose: bool) -> ContractCheck:
        room = [m for m in sorted(graph.modules) if _within(m, self.modules)]
        bad = [
            f"{importer} imports {imported}"
            for importer in room
            for imported in sorted(graph.find_modules_directly_imported_by(importer))
            if not self._may(imported)
        ]
        if not room:
            bad = [f"no module lies below {', '.join(map(str, self.modules))}"]  # type: ignore[arg-type]
        return ContractCheck(kept=not bad, metadata={"bad": bad})

    def _may(self, imported: str) -> bool:
        top = imported.partition(".")[0]
        if top == self.session_options["root_packages"][0]:
            return _within(imported, self.allowed)
        return top in sys.stdlib_module_names or "*" in self.libraries or top in self.libraries  # type: ignore[operator]

    def render_broken_contract(self, check: ContractCheck) -> None:
        for line in check.metadata["bad"]:
            output.print_error(line)


def _within(module: str, packages: Any) -> bool:
    return any(module == p or module.startswith(f"{p}.") for p in packages)
