// Format: the times of this page beyond those of all pages (numbers.js): clocks and long spans.
//
// Owns how each is written in the page's language. Knows nothing of frames.

export function createFormat(words) {
  const { language, t } = words;
  const time = { hour: "2-digit", minute: "2-digit", second: "2-digit", hourCycle: "h23" };
  const seconds = new Intl.DateTimeFormat(language, time);
  const millis = new Intl.DateTimeFormat(language, { ...time, fractionalSecondDigits: 3 });

  return {
    /** 14:03:12 of unix ms */
    clock: (unixMs) => seconds.format(unixMs),
    clockMs: (unixMs) => millis.format(unixMs),
    /** 0 s, 4.7 s, 12 min 30 s, 3 h 20 min, 2 d 4 h */
    long(totalSeconds) {
      if (totalSeconds === 0) return words.seconds("0");
      if (totalSeconds < 59.95) return words.duration(totalSeconds * 1000);
      const whole = Math.round(totalSeconds);
      const minutes = Math.floor(whole / 60);
      if (minutes < 60) return t("minutes_seconds", { minutes, seconds: whole % 60 });
      if (minutes < 48 * 60) return t("hours_minutes", { hours: Math.floor(minutes / 60), minutes: minutes % 60 });
      return t("days_hours", { days: Math.floor(minutes / 1440), hours: Math.floor(minutes / 60) % 24 });
    },
  };
}
