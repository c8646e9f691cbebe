// Numbers: figures as the page's language writes them: counts, times, bytes, operations, shares and money.
//
// Owns rounding and units. Knows nothing of what a figure means.

const BYTE_UNITS = ["B", "kB", "MB", "GB", "TB"];
const PREFIXES = ["", "k", "M", "G", "T", "P"];
const SECONDS = { en: " s", ko: "초" };

export function createNumbers(language) {
  const integers = new Intl.NumberFormat(language);
  const digits = new Map(); // number of significant digits -> format
  const percent = (options) => new Intl.NumberFormat(language, { style: "percent", ...options });
  const coarse = percent({ maximumFractionDigits: 0 });
  const fine = percent({ maximumSignificantDigits: 2 });
  const signed = percent({ maximumSignificantDigits: 2, signDisplay: "exceptZero" });

  function number(value, numDigits = 3) {
    if (!digits.has(numDigits)) digits.set(numDigits, new Intl.NumberFormat(language, { maximumSignificantDigits: numDigits }));
    return digits.get(numDigits).format(value);
  }

  /** The value in steps of a thousand, as far as there are units. */
  function scaled(value, units) {
    let unit = 0;
    for (; value >= 999.5 && unit < units.length - 1; unit++) value /= 1000;
    return `${number(value)} ${units[unit]}`;
  }

  const si = (value, unit) =>
    scaled(
      value,
      PREFIXES.map((prefix) => prefix + unit),
    );

  const seconds = (text) => `${text}${SECONDS[language]}`;

  return {
    number,
    /** The text of a number, as seconds. */
    seconds,
    integer: (value) => integers.format(value),
    /** 0.4 ms, 96 ms, 1.24 s, 62.1 s */
    duration(ms) {
      if (ms >= 999.5) return seconds(number(ms / 1000));
      return `${number(ms, ms < 10 ? 2 : 3)} ms`;
    },
    /** 512 B, 4.92 MB: decimal units */
    bytes: (count) => scaled(count, BYTE_UNITS),
    rate: (perSecond) => number(perSecond),
    flops: (count) => si(count, "FLOP"),
    flopRate: (perSecond) => si(perSecond, "FLOP/s"),
    joules: (value) => si(value, "J"),
    /** <0.1%, 0.4%, 7.1%, 71% */
    share(value) {
      if (value > 0 && value < 0.001) return `<${fine.format(0.001)}`;
      return (value < 0.095 ? fine : coarse).format(value);
    },
    /** −7.1%, 0%, +71% */
    signedShare: (value) => signed.format(value).replace("-", "−"),
    /** Less than a cent as a part of one; less than one unit with two digits that say something. Parts take the unit of their `sum`. */
    money(amount, currency, sum = amount) {
      if (currency === "USD" && sum > 0 && sum < 0.01) return `${number(amount * 100, 2)} ¢`;
      const options = amount > 0 && amount < 1 ? { maximumSignificantDigits: 2 } : {};
      return new Intl.NumberFormat(language, { style: "currency", currency, ...options }).format(amount);
    },
  };
}
