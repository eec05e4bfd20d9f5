"""Commands for what is shipped: keys, signatures, archives; and what a device does with them."""

# Each command imports what it runs when it runs.
# ruff: noqa: PLC0415

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from bitferry.pipeline.measure.latency import Effort

commands = typer.Typer()
keys = typer.Typer(help="Make the keys that sign bundles, and the lists of keys that devices trust.")
commands.add_typer(keys, name="keys")

Root = Annotated[Path, typer.Option("--root", help="The folder on the device that holds what runs.")]
SigningKey = Annotated[
    Path, typer.Option("--key", help="A private key; its password, if it has one, in BITFERRY_KEY_PASSWORD.")
]
PASSWORD = "BITFERRY_KEY_PASSWORD"  # noqa: S105 - the name of a variable


@keys.command(name="new")
def new_key(
    path: Annotated[Path, typer.Argument(metavar="NAME", help="NAME.key and NAME.pub are written.")],
) -> None:
    """Make a key that signs bundles, and the public half for devices. With BITFERRY_KEY_PASSWORD set it is encrypted.

    Example: bitferry keys new keys/fleet
    """
    from bitferry.pipeline.shipping import keys as made

    for written in made.new(path, os.environ.get(PASSWORD)):
        typer.echo(written)


@keys.command(name="list")
def list_keys(
    publics: Annotated[list[Path], typer.Argument(metavar="KEY.pub...", help="All keys that are to be trusted.")],
    number: Annotated[int, typer.Option(help="Of this list; higher than the one before.", min=2)],
    key: SigningKey,
    output: Annotated[Path, typer.Option("--output", "-o", help="The signed list.")] = Path("keys-signed.json"),
) -> None:
    """Sign a list of the keys that devices are to trust from now on, with one that they trust already.

    Example: bitferry keys list new.pub spare.pub --number 2 --key old.key -o keys-2.json
    """
    from bitferry.pipeline.shipping import keys as made

    typer.echo(made.sign_list(publics, number, key, output, os.environ.get(PASSWORD)))


@commands.command()
def sign(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="A bundle's folder.")],
    key: SigningKey,
) -> None:
    """Sign a bundle in the OpenSSF model-signing format, and pack it into one archive beside it.

    Example: bitferry sign dist/fashion-resnet18-openvino-1.0.0 --key keys/fleet.key
    """
    from bitferry.pipeline.shipping import sign as signing

    signing.sign(bundle, key, os.environ.get(PASSWORD))
    typer.echo(signing.archive(bundle))


@commands.command()
def reproduce(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="A bundle's folder.")],
    recipe: Annotated[Path, typer.Option("--recipe", help="The recipe it was built from.")],
    build: Annotated[Path | None, typer.Option("--build", help="An empty folder. Default: one that goes.")] = None,
    trust_: Annotated[bool, typer.Option("--trust", help="Load a .pt2 program, which can run code.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Build a bundle again from nothing and compare every file; exit code 0 where all are the same, byte by byte.

    What was measured is taken over from the bundle. Each file that differs is named, with what is known of why.

    Example: bitferry reproduce dist/fashion-resnet18-openvino-1.0.0 --recipe recipes/fashion-resnet18.toml
    """
    from bitferry.pipeline.shipping import reproduce as again

    raise typer.Exit(again.show(again.reproduce(bundle, recipe, build, trust=trust_), as_json=json_))


@commands.command()
def publish(
    archive: Annotated[Path | None, typer.Argument(metavar="[ARCHIVE]", help="What `bitferry sign` wrote.")] = None,
    repository: Annotated[Path, typer.Option("--repository", help="The folder that a web server serves.")] = Path(
        "repository"
    ),
    keys_: Annotated[
        Path, typer.Option("--keys", help="A folder outside it for the keys of its four roles; made with them.")
    ] = Path("repository-keys"),
    rotate: Annotated[str | None, typer.Option(help="Replace the key of root, targets, snapshot or timestamp.")] = None,
) -> None:
    """Put an archive into a TUF repository, static files for any web server; without one, sign it anew for longer.

    Example: bitferry publish dist/fashion-resnet18-openvino-1.0.0.tar.gz --repository public --keys repository-keys
    """
    from bitferry.pipeline.shipping import publish as publishing

    done = publishing.run(repository, keys_, archive, rotate)
    role, date = done.first
    typer.echo(f"{done.repository} offers {', '.join(done.archives)}")
    typer.echo(f"its {role} expires first, {date:%Y-%m-%d %H:%M} UTC: `bitferry publish` without an archive renews it")


@commands.command()
def device(
    output: Annotated[Path, typer.Option("--output", "-o", help="The program.")] = Path("bitferry-device.pyz"),
) -> None:
    """Write the program of a device, which installs archives there: one file that needs Python and cryptography.

    Example: bitferry device -o bitferry-device.pyz
    """
    from bitferry.pipeline.bundle import write_agent

    write_agent(output)
    typer.echo(output)


def verify(
    bundle: Path, data: Path | None, effort: "Effort", there: tuple[str | None, str, str], *, as_json: bool
) -> int:
    """Prove a bundle anew, here or on another machine (its name, how to call ssh, its Python); give the exit code."""
    from bitferry.pipeline import recheck

    host, ssh, python = there
    if host is None:
        return recheck.show(recheck.verify(bundle, data, effort=effort), as_json=as_json)
    from bitferry.pipeline.shipping import remote

    found = remote.verify(bundle, host, data, python=python, effort=effort, ssh=remote.command(ssh))
    return recheck.show(found, as_json=as_json)


@commands.command()
def trust(
    given: Annotated[Path, typer.Argument(metavar="KEY.pub|LIST.json", help="A first key, or a signed list.")],
    root: Root,
) -> None:
    """Pin the key that bundles must be signed with, or take a newer list of keys that a trusted one signed.

    Example: bitferry trust keys/fleet.pub --root /opt/model
    """
    _agent("trust", str(given), "--root", str(root))


@commands.command()
def install(
    archive: Annotated[Path, typer.Argument(metavar="ARCHIVE", help="What `bitferry sign` wrote.")],
    root: Root,
    allow_downgrade: Annotated[bool, typer.Option("--allow-downgrade", help="Take an older version, too.")] = False,
) -> None:
    """Check an archive, unpack it beside what runs, try it, and switch to it at once.

    Example: bitferry install fashion-resnet18-openvino-1.0.0.tar.gz --root /opt/model
    """
    _agent("install", str(archive), "--root", str(root), *(["--allow-downgrade"] if allow_downgrade else []))


@commands.command()
def update(
    repository: Annotated[str, typer.Option("--repository", help="The address where a repository is served.")],
    root: Root,
    name: Annotated[str | None, typer.Option(help="Of the model, where the repository has several.")] = None,
    target: Annotated[str | None, typer.Option(help="Of the bundle, where the model has several.")] = None,
    trusted_root: Annotated[
        Path | None, typer.Option(help="The publisher's root.json, come by a way you trust; needed once.")
    ] = None,
) -> None:
    """Fetch the newest archive from a publisher's repository, and install it unless it runs already.

    Example: bitferry update --repository https://example.org/models --root /opt/model --trusted-root root.json
    """
    options = {"--name": name, "--target": target, "--trusted-root": trusted_root}
    words = [word for option, value in options.items() if value is not None for word in (option, str(value))]
    _agent("update", "--repository", repository, "--root", str(root), *words)


@commands.command()
def rollback(root: Root) -> None:
    """Go back to what ran before.

    Example: bitferry rollback --root /opt/model
    """
    _agent("rollback", "--root", str(root))


@commands.command()
def selftest(root: Root, json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Check and try what is installed; where it fails, what ran before runs again.

    Example: bitferry selftest --root /opt/model
    """
    _agent("selftest", "--root", str(root), *(["--json"] if json_ else []))


@commands.command()
def status(root: Root, json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Say what is installed, what ran before, and what was done last.

    Example: bitferry status --root /opt/model
    """
    _agent("status", "--root", str(root), *(["--json"] if json_ else []))


def _agent(*words: str) -> None:
    """Do what the device's own program does."""
    from bitferry.device import agent

    raise typer.Exit(agent.main(words))
