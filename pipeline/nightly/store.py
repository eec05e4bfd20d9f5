"""temporary."""


class Store:
    def __init__(self, url):
        self.url = url
