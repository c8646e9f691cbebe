// Format: the numbers of this page beyond those of all pages: shares, clocks, money, powers of ten.
//
// Owns how each is written in the page's language. Knows nothing of frames.

const PREFIXES = ["", "k", "M", "G", "T", "P"];

export function createFormat(words) {
  const { language, number, t } = words;
  const percent = (options) => new Intl.NumberFormat(language, { style: "percent", ...options });
  const coarse = percent({ maximumFractionDigits: 0 });
  const fine = percent({ maximumSignificantDigits: 2 });
  const signed = percent({ maximumSignificantDigits: 2, signDisplay: "exceptZero" });
  const time = { hour: "2-digit", minute: "2-digit", second: "2-digit", hourCycle: "h23" };
  const seconds = new Intl.DateTimeFormat(language, time);
  const millis = new Intl.DateTimeFormat(language, { ...time, fractionalSecondDigits: 3 });

  function si(value, unit) {
    let prefix = 0;
    for (; value >= 999.5 && prefix < PREFIXES.length - 1; prefix++) value /= 1000;
    return `${number(value)} ${PREFIXES[prefix]}${unit}`;
  }

  return {
    /** <0.1 %, 0.4 %, 7.1 %, 71 % */
    share(value) {
      if (value > 0 && value < 0.001) return `<${fine.format(0.001)}`;
      return (value < 0.095 ? fine : coarse).format(value);
    },
    signedShare: (value) => signed.format(value).replace("-", "−"),
    /** 14:03:12 of unix ms */
    clock: (unixMs) => seconds.format(unixMs),
    clockMs: (unixMs) => millis.format(unixMs),
    money: (amount, currency) => `${number(amount)} ${currency}`,
    flops: (value) => si(value, "FLOP"),
    flopRate: (value) => si(value, "FLOP/s"),
    joules: (value) => si(value, "J"),
    /** 0 s, 4.7 s, 12 min 30 s, 3 h 20 min, 2 d 4 h */
    long(totalSeconds) {
      if (totalSeconds === 0) return t("seconds", { seconds: 0 });
      if (totalSeconds < 59.95) return words.duration(totalSeconds * 1000);
      const whole = Math.round(totalSeconds);
      const minutes = Math.floor(whole / 60);
      if (minutes < 60) return t("minutes_seconds", { minutes, seconds: whole % 60 });
      if (minutes < 48 * 60) return t("hours_minutes", { hours: Math.floor(minutes / 60), minutes: minutes % 60 });
      return t("days_hours", { days: Math.floor(minutes / 1440), hours: Math.floor(minutes / 60) % 24 });
    },
  };
}

/** The end of an id, which tells runs apart; the whole id is where there is room. */
export const shortId = (id) => (id.length <= 18 ? id : `${id.slice(0, 9)}…${id.slice(-6)}`);
