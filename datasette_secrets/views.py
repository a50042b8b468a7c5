"""The pages."""
ROUTES = ()


def menu_links(datasette, actor):
    return None
