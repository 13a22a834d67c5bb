"""When cron expressions fire in a year, by Python's own calendar and time zones: an account that shares nothing with ours.

Reads lines "ZONE<tab>FIRST DAY<tab>DAYS<tab>EXPRESSION" of six fields from standard input, and answers each with one line: the
zone's offsets from UTC over those days (in seconds, one for each day at noon), a tab, and the instants, in seconds since 1970.

An expression that names its hours fires once on each day that it names: at its wall-clock time, at the first of the two where
that time comes twice, and at the end of the gap where it does not come. One that fires in every hour fires whenever the clock
shows its time.
"""

import sys
from datetime import date, datetime, timedelta, timezone
from zoneinfo import ZoneInfo

UTC = timezone.utc
MONTHS = "JAN FEB MAR APR MAY JUN JUL AUG SEP OCT NOV DEC".split()
DAYS = "SUN MON TUE WED THU FRI SAT".split()


def numbers(field, least, most, names=()):
    """The numbers that a field allows."""
    found = set()
    for part in field.upper().split(","):
        span, _, step = part.partition("/")
        if span == "*":
            first, last = least, most
        else:
            first, _, last = span.partition("-")
            value = lambda text: names.index(text) + least if text in names else int(text)
            first = value(first)
            last = value(last) if last else (most if step else first)
        found.update(range(first, last + 1, int(step or 1)))
    return found


class Cron:
    def __init__(self, text):
        second, minute, hour, day, month, weekday = text.split()
        self.seconds = sorted(numbers(second, 0, 59))
        self.minutes = sorted(numbers(minute, 0, 59))
        self.hours = sorted(numbers(hour, 0, 23))
        self.every_hour = len(self.hours) == 24
        self.days = numbers(day, 1, 31)
        self.months = numbers(month, 1, 12, MONTHS)
        self.weekdays = {n % 7 for n in numbers(weekday, 0, 7 if "7" in weekday else 6, DAYS)}

    def on(self, day):
        return day.day in self.days and day.month in self.months and (day.isoweekday() % 7) in self.weekdays

    def times(self):
        return [(h, m, s) for h in self.hours for m in self.minutes for s in self.seconds]


def end_of_gap(local, zone):
    """The first instant whose time on the clock is later than one that the clock skips."""
    before, after = local.replace(tzinfo=UTC) - timedelta(days=1), local.replace(tzinfo=UTC) + timedelta(days=1)
    while after - before > timedelta(seconds=1):
        middle = before + timedelta(seconds=(after - before) // timedelta(seconds=2))
        shown = middle.astimezone(zone).replace(tzinfo=None)
        before, after = (middle, after) if shown <= local else (before, middle)
    return after


def by_the_clock(cron, zone, first, days):
    """Each day's times, one instant each."""
    fired = set()
    for n in range(-1, days + 1):
        day = first + timedelta(days=n)
        if not cron.on(day):
            continue
        for h, m, s in cron.times():
            local = datetime(day.year, day.month, day.day, h, m, s)
            instant = local.replace(tzinfo=zone, fold=0).astimezone(UTC)
            if instant.astimezone(zone).replace(tzinfo=None) != local:
                instant = end_of_gap(local, zone)
            fired.add(int(instant.timestamp()))
    return fired


def as_time_passes(cron, zone, first, days):
    """Each instant at which the clock shows one of the times."""
    fired = set()
    start = datetime(first.year, first.month, first.day, tzinfo=UTC) - timedelta(days=1)
    seconds = cron.seconds
    minutes = set(cron.minutes)
    for n in range((days + 2) * 24 * 60):
        instant = start + timedelta(minutes=n)
        shown = instant.astimezone(zone)
        # Offsets are whole minutes in our century.
        if shown.minute in minutes and cron.on(shown.date()):
            at = int(instant.timestamp())
            fired.update(at + second for second in seconds)
    return fired


for line in sys.stdin:
    name, first, days, expression = line.rstrip("\n").split("\t")
    zone, first, days, cron = ZoneInfo(name), date.fromisoformat(first), int(days), Cron(expression)
    fired = (as_time_passes if cron.every_hour else by_the_clock)(cron, zone, first, days)
    start = int(datetime(first.year, first.month, first.day, tzinfo=UTC).timestamp())
    within = sorted(at for at in fired if start < at <= start + days * 86400)
    noons = [datetime(first.year, first.month, first.day, 12, tzinfo=UTC) + timedelta(days=n) for n in range(days)]
    offsets = [str(int(noon.astimezone(zone).utcoffset().total_seconds())) for noon in noons]
    print(",".join(offsets) + "\t" + ",".join(map(str, within)))
