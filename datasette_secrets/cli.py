"""The commands."""
import click


@click.group()
def secrets() -> None:
    """Manage secrets"""


@secrets.command()
def generate_encryption_key() -> None:
    """Print a new master key"""
    from .envelope import generate_master_key

    click.echo(generate_master_key())
