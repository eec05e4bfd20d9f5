"""An SQLite file that outlives this program: opened, checked and migrated, and its errors told in one line."""

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from bitferry.device.errors import InputError, first_line
from bitferry.pipeline.nightly import packed

MIGRATIONS = sorted((Path(__file__).parent / "migrations").glob("*.sql"), key=lambda path: int(path.stem))
"""Each `N.sql` turns schema N − 1 into N; a new file runs them all."""
VERSION = len(MIGRATIONS)
APPLICATION = int.from_bytes(b"bfry", "big")
PATIENCE_SECONDS = 30.0
"""To wait for another process that writes."""
SMALLEST_BYTES = 512
"""Of a page: SQLite takes any smaller file for an empty one, and would write over it."""

TOLD = {
    "SQLITE_BUSY": "another process has been writing to it for {patience:g} s; wait until it ends",
    "SQLITE_NOTADB": "it is no SQLite database; expected a history of nights, as `bitferry matrix` writes it",
    "SQLITE_CORRUPT": "it is damaged; take an earlier copy, or save what is left with `sqlite3 FILE .recover`",
    "SQLITE_FULL": "the disk is full; free some space",
    "SQLITE_READONLY": "it may not be written; check the rights of the file and of its folder",
    "SQLITE_CANTOPEN": "it cannot be opened; check that it is a file, and the rights of its folder",
}


class Database:
    """One open file. Changes go through `transaction`: all of one or, after a kill at any moment, nothing of it.

    It keeps SQLite's rollback journal: one file at rest, on any file system; a write-ahead log would add two.
    """

    def __init__(self, path: Path, *, read_only: bool = False, patience: float = PATIENCE_SECONDS) -> None:
        """Open the file, which is begun unless `read_only`; an older schema is migrated, `read_only` in a copy.

        Raises InputError when it is missing, no history, damaged, locked for `patience` seconds, or of a newer schema.
        """
        self.path, self.patience = path, patience
        if read_only and not path.is_file():
            raise InputError(f"there is no history at {path}; `bitferry matrix` begins one")
        with self._errors_told():
            if not read_only:
                path.parent.mkdir(parents=True, exist_ok=True)
            if path.is_file() and 0 < path.stat().st_size < SMALLEST_BYTES:
                raise InputError(f"{path}: {TOLD['SQLITE_NOTADB']}")
            # Not mode=ro: only who may write can clear up behind a writer that was killed.
            self._connection = self._connect(f"{path.absolute().as_uri()}?mode={'rw' if read_only else 'rwc'}")
            try:
                self._prepare(read_only)
            except BaseException:
                self.close()
                raise

    def _connect(self, uri: str) -> sqlite3.Connection:
        connection = sqlite3.connect(uri, uri=True, timeout=self.patience, isolation_level=None)
        connection.create_function("sha256", 1, packed.digest, deterministic=True)
        connection.create_function("deflated", 1, packed.deflated, deterministic=True)
        connection.create_function("npz_part", 2, packed.npz_part, deterministic=True)
        return connection

    def _prepare(self, read_only: bool) -> None:
        version = self._version()
        if read_only:
            if version < VERSION:
                self._copy()
                self._migrate()
            self._connection.execute("PRAGMA query_only = ON")
            return
        found = [str(row[0]) for row in self.rows("PRAGMA quick_check(1)")]
        if found != ["ok"]:
            raise InputError(f"{self.path}: {TOLD['SQLITE_CORRUPT']} ({found[0].splitlines()[-1]})")
        if version < VERSION:
            with self.transaction():
                self._back_up(self._version())  # again: another process may have been faster
                self._migrate()

    def _version(self) -> int:
        """Give the schema's version, 0 for an empty file; raise InputError for a newer one and for foreign files."""
        version, application = (self.rows(f"PRAGMA {name}")[0][0] for name in ("user_version", "application_id"))
        if application != APPLICATION and self.rows("SELECT 1 FROM sqlite_schema LIMIT 1"):
            raise InputError(f"{self.path} is another program's database; expected a history of nights")
        if version > VERSION:
            raise InputError(
                f"{self.path} has schema {version}; this bitferry reads up to schema {VERSION}: update bitferry"
            )
        return int(version)

    def _back_up(self, version: int) -> None:
        """Copy the file as it is before a migration, beside it."""
        if 0 < version < VERSION:
            partial, final = (self.path.with_name(f"{self.path.name}.v{version}{end}") for end in (".part", ".bak"))
            partial.unlink(missing_ok=True)
            # A connection of its own sees what is committed; opening the file past SQLite would drop its locks.
            source, copy = (self._connect(path.absolute().as_uri()) for path in (self.path, partial))
            with closing(source), closing(copy):
                source.backup(copy)
            partial.replace(final)

    def _copy(self) -> None:
        """Go on with a private temporary copy."""
        copy = self._connect("")
        self._connection.backup(copy)
        self._connection.close()
        self._connection = copy

    def _migrate(self) -> None:
        for number in range(self._version() + 1, VERSION + 1):
            for statement in _statements(MIGRATIONS[number - 1].read_text()):
                self._connection.execute(statement)
            self._connection.execute(f"PRAGMA user_version = {number}")

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Write all of what is done inside, or nothing where it raises."""
        self.run("BEGIN IMMEDIATE")
        try:
            yield
            self.run("COMMIT")
        except BaseException:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            raise

    def rows(self, statement: str, values: Sequence[object] = ()) -> list[Any]:
        """Give everything that a query finds."""
        with self._errors_told():
            return self._connection.execute(statement, values).fetchall()

    def run(self, statement: str, values: Sequence[object] = ()) -> int:
        """Run a statement; give how many rows it changed."""
        with self._errors_told():
            return self._connection.execute(statement, values).rowcount

    @contextmanager
    def _errors_told(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            name = "_".join(getattr(error, "sqlite_errorname", "").split("_")[:2])
            told = TOLD.get(name, first_line(error)).format(patience=self.patience)
            raise InputError(f"{self.path}: {told}") from error
        except OSError as error:
            raise InputError(f"{self.path}: {first_line(error)}") from error

    def close(self) -> None:
        """Close the file; it may then be copied as it is."""
        self._connection.close()


def _statements(script: str) -> Iterator[str]:
    """Take a script apart: sqlite3's own `executescript` would commit before it begins."""
    statement = ""
    for line in script.splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""
